"""Shortening any axis of any traced model: trace, axes, groups, surgery, oracle, persistence."""
