"""The Control Center (`cc`) module of COS."""
