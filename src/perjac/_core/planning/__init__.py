"""Numbers that choose: decisions, schedules, memory, trials."""
