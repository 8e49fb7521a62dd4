"""The handlers of requests for an engine: answered from the tiers, or passed on."""
