"""Results as pages: tables, pictures, goals and remarks on bounds."""
