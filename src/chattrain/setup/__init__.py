"""A run before it trains: planned once, then built in each process; and what it says of itself at its end."""
