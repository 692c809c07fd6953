"""Keys, certificates and invitations of a consortium."""
