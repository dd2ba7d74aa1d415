"""A runner's handle, and the steps of a runner that are more than one native step."""
