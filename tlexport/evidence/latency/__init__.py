"""How long a call takes: in turns (closed loop), at an arrival rate (open loop), and what the machine did meanwhile."""
