"""One edit of one leaf in bounded memory."""
