"""Methods that let many weights be one stored number."""
