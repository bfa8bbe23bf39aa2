INSERT INTO quotas (tenant_uid, name, most) VALUES ('t1', 'max_memories_per_tenant', 5);
