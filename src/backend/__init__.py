"""The backend modules of COS."""
