"""What a run would take, before it is run: memory, time and money. See command=plan."""
