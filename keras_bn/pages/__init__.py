"""What a person reads: HTML, lines of text, files written whole."""
