"""What the main command can do, one module for each mode. Jobs put the library's parts together; they hold no mathematics."""
