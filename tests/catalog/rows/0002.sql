-- A key of some memories.
UPDATE api_keys SET memories = '{"m1": "alice"}' WHERE key_id = 'k2';
