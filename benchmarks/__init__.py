"""What the claims of performance rest on. Run one with: python -m benchmarks.NAME; each says what it measured."""
