"""What methods of one kind share: a method derives from one of these classes."""
