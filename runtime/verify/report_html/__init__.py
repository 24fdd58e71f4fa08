"""The report of a verification as one HTML file: no script, no request, charts as inline SVG."""
