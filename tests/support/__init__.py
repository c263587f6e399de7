"""What tests share: small networks, odd inputs, browsers, parallel runs."""
