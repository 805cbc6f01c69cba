"""`python -m tests.toys.hostile`: write the table of hostile inputs into docs/security.md."""

from tests.toys.hostile import table

table.write()
