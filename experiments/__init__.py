"""The paper's tables and figures, a file each: claim, command, expected result."""
