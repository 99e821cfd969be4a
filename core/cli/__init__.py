"""What every command needs: configuration, console, errors, files."""
