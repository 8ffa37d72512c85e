"""What the main command can do, a module for each mode. Jobs put the library's parts together."""
