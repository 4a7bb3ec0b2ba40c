"""The bundled Qubes core: app, VM classes, properties, events, policy."""
