"""Methods that remove channels, neurons and heads: whole units of any axis."""
