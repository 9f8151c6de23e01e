"""The hashed locks: made, checked, tried for a Mac, audited."""
