"""What `check` looks at: one module a concern, each function returns findings and changes nothing."""
