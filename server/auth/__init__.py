"""Authentication: tenants, their credentials and their limits."""
