"""How programs run on a machine: what they are compiled for, files, tables, errors."""
