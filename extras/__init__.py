"""What makes the four files at the top faster, safer and complete. Nothing in here is needed to
understand RoSA."""
