"""What the longer commands do behind the command line: options → work, arrays and lines."""
