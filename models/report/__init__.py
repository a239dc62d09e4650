"""What a bundle is worth: report.html, and tables over many bundles."""
