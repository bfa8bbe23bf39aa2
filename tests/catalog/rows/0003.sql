-- One memory is moving to its own second model; the others follow the default.
UPDATE tenants SET default_model_id = 'second' WHERE uid = 't2';
UPDATE memories SET default_model_id = 'fake';
UPDATE memories SET next_model_id = 'second', own_model = TRUE WHERE uid = 'm1';
UPDATE encodings SET complete = TRUE WHERE model_id = 'fake';
