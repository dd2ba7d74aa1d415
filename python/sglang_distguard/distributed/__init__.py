"""World, groups and settings that runners share or own, and how several ranks agree on them."""
