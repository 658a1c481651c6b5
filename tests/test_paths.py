"""Which path computes what: native code, or torch's operators with the same meaning."""
