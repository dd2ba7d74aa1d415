"""A runner's handle, and the steps of a runner that need more than one native step."""
