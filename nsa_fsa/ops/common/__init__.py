"""What two operators or more share."""
