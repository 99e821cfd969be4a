"""What every command needs: configuration and its help, console, errors, files, names in messages."""
