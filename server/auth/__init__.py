"""Who asks: tenants, their credentials and their limits."""
