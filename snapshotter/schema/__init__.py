"""The system file's schema: one .sql file per version, applied in order, each in one transaction."""
