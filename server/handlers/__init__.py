"""What answers the requests for an engine: from the tiers, or by passing them on."""
