"""What methods are made of; each mechanism once."""
