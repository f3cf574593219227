"""What real models need beyond a loop on one machine; each module wants an extra of its own."""
