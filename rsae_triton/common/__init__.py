"""What every room uses: errors, argument checks, files, the hub, progress. Imports no other room."""
