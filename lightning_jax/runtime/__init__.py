"""How programs run on a machine: target, compiler options, huge pages, files, tables, programs."""
