"""The pages and pictures for people: generated pages, links, the site, screenshots of real runs."""
