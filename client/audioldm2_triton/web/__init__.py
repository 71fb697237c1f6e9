"""`audioldm2 web`: a page to listen on. Only `page` needs the extra `web`."""
