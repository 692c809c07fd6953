"""What goes over the wire, and between the server's processes."""
