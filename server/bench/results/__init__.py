"""What measured requests tell: figures, a verdict, files, comparisons and ramps."""
