#!lua name=luthier1

-- The operation log's atomic steps. One function, one hash tag: a cluster may split by run.
-- docs: reliability 2.2. The library's name carries its major version, so that two releases can run
-- side by side during an upgrade.

local DIGEST_CHARS = 32
local MAX_USAGE_ENTRIES = 1000000

local function num(value, default)
  return tonumber(value or default)
end

-- Sampling seqs reach 10^18 and lose digits as Lua numbers: they are only ever concatenated.
-- Training seqs are int32 on the wire.
local function entry_id(seq)
  if seq == 0 then return '0-1' end -- Redis refuses 0-0
  return string.format('%d-0', seq)
end

local function rest(args, first)
  local out = {}
  for i = first, #args do out[#out + 1] = args[i] end
  return out
end

local function field_of(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name then return fields[i + 1] end
  end
end

-- An upvalue lives as long as the server's process: one look at INFO for each start.
local server_id
local function this_server()
  if not server_id then
    server_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  end
  return server_id
end

-- Every function of an owner names the server on which it has last made sure that HEAD is its own.
-- Another one may have gone back to an earlier state, in which it takes an old epoch for the newest.
local function check_server(wanted)
  if wanted ~= '' and wanted ~= this_server() then
    error(redis.error_reply('RESTARTED since the caller has read HEAD'))
  end
end

-- server(header) -> the id of the server that holds this run now
local function server()
  return this_server()
end

-- Per-seq fields of the header, deleted by trim: d:{seq} = digest, payload bytes and time of
-- admission, x:{seq} = the op failed, s:{seq} = digest of the run's state after it, m:{seq} = how
-- often its micro-batch is halved; by commit: n:{seq} = attempts begun and the epoch of the last,
-- b:{seq} = attempts that ended with the engine's death, a:{seq} = the last of those.
local function remember(header, seq, digest, bytes, now)
  local known = string.sub(digest, 1, DIGEST_CHARS) .. ' ' .. bytes .. ' ' .. now
  redis.call('HSET', header, 'd:' .. seq, known)
end

local function recall(header, seq)
  local value = redis.call('HGET', header, 'd:' .. seq)
  if not value then return nil, 0 end
  local digest, bytes = string.match(value, '^(%S+) (%d+)')
  return digest, tonumber(bytes)
end

local function same(digest, known)
  -- A trimmed digest counts as the same request: ids are arithmetic, its answer does not change.
  return known == nil or known == string.sub(digest, 1, DIGEST_CHARS)
end

local function append(log, seq, fields)
  redis.call('XADD', log, entry_id(seq), unpack(fields))
end

-- 0 - x, not -x: Redis 7.0 writes the negative zero of Lua as '-0', which is no integer to it.
local function unpark(header, parked, seq)
  redis.call('HDEL', parked, seq)
  local _, bytes = recall(header, seq)
  redis.call('HINCRBY', header, 'parked_bytes', 0 - bytes)
end

-- gap_since is there while something waits above a gap, and with it what `lost` has noted.
local function forget_gap(header, parked)
  if redis.call('HLEN', parked) == 0 then redis.call('HDEL', header, 'gap_since', 'lost') end
end

-- Everything up to `admitted` has arrived: what is parked directly above it enters the log.
-- -> the new admitted
local function advance(header, log, parked, channel, admitted)
  while true do
    local packed = redis.call('HGET', parked, admitted + 1)
    if not packed then break end
    admitted = admitted + 1
    append(log, admitted, cmsgpack.unpack(packed))
    unpark(header, parked, admitted)
  end
  redis.call('HSET', header, 'admitted', admitted)
  forget_gap(header, parked)
  redis.call('SPUBLISH', channel, admitted)
  return admitted
end

-- seq will not be executed again: its bytes and attempts are not counted any more.
local function forget_pending(header, seq)
  local _, bytes = recall(header, seq)
  redis.call('HINCRBY', header, 'bytes', 0 - bytes)
  redis.call('HDEL', header, 'n:' .. seq, 'b:' .. seq, 'a:' .. seq)
end

-- admit(header, log, parked, news channel; tenant, seq, digest, bytes, max_ahead, max_ops, max_bytes,
--       max_parked_bytes, now ms, header fields as JSON for op 0 or '', entry fields ...)
-- -> {status, owner, admitted}. OK | DUP | MISMATCH | NORUN | FAR | BUSY | FULL | DEAD
local function admit(keys, args)
  local header, log, parked = keys[1], keys[2], keys[3]
  local tenant, seq, digest, bytes = args[1], tonumber(args[2]), args[3], tonumber(args[4])
  local max_ahead, max_ops = tonumber(args[5]), tonumber(args[6])
  local max_bytes, max_parked_bytes = tonumber(args[7]), tonumber(args[8])
  local now, fields = args[9], rest(args, 11)

  local h = redis.call('HMGET', header, 'tenant', 'admitted', 'committed', 'bytes', 'told', 'owner',
    'status', 'parked_bytes')
  if not h[1] then
    if seq ~= 0 or args[10] == '' then return { 'NORUN', '', -1 } end
    for name, value in pairs(cjson.decode(args[10])) do
      redis.call('HSET', header, name, value)
    end
    redis.call('HSET', header, 'tenant', tenant, 'status', 'active', 'epoch', 0, 'owner', '',
      'admitted', -1, 'committed', -1, 'bytes', 0, 'parked_bytes', 0, 'told', -1)
    h = { tenant, '-1', '-1', '0', '-1', '', 'active', '0' }
  end
  if h[1] ~= tenant then return { 'NORUN', '', -1 } end

  local admitted, committed = num(h[2]), num(h[3])
  local pending, parked_bytes, owner = num(h[4]), num(h[8], 0), h[6]
  local is_parked = seq > admitted and redis.call('HEXISTS', parked, seq) == 1
  if seq <= admitted or is_parked then
    if same(digest, (recall(header, seq))) then return { 'DUP', owner, admitted } end
    return { 'MISMATCH', owner, admitted }
  end
  if h[7] ~= 'active' then return { 'DEAD', owner, admitted } end
  if seq > admitted + max_ahead then return { 'FAR', owner, admitted } end

  local fills_gap = seq == admitted + 1 and redis.call('HLEN', parked) > 0
  local over = pending + bytes > max_bytes or seq - committed > max_ops
  -- Refuse only while something can be executed: the official SDK withholds chunk 1 until every later
  -- chunk is accepted, so a refusal with an idle run would wait for itself.
  if over and admitted > committed and not fills_gap then return { 'BUSY', owner, admitted } end
  -- A refusal is what the gateway parks instead after FULL: it carries no payload and always fits.
  local over_parked = parked_bytes + bytes > max_parked_bytes
  if seq > admitted + 1 and over_parked and field_of(fields, 'kind') ~= 'rejected' then
    return { 'FULL', owner, admitted }
  end

  remember(header, seq, digest, bytes, now)
  redis.call('HINCRBY', header, 'bytes', bytes)
  fields[#fields + 1] = 'told'
  fields[#fields + 1] = h[5]
  if seq > admitted + 1 then
    redis.call('HSET', parked, seq, cmsgpack.pack(fields))
    redis.call('HSETNX', header, 'gap_since', now)
    redis.call('HINCRBY', header, 'parked_bytes', bytes)
    return { 'OK', owner, admitted }
  end

  append(log, seq, fields)
  admitted = advance(header, log, parked, keys[4], seq)
  -- Another gap may be left above the one that was filled.
  if redis.call('HEXISTS', header, 'gap_since') == 1 then
    redis.call('HSET', header, 'gap_since', now)
  end
  return { 'OK', owner, admitted }
end

-- reject_run(header, outcome; tenant, digest, header fields as JSON, outcome ttl ms, outcome fields ...)
-- A run whose creation was refused: op 0 is admitted and failed in one step, because no worker will
-- ever own it. -> {status}. OK | DUP | MISMATCH | NORUN
local function reject_run(keys, args)
  local header, outcome = keys[1], keys[2]
  local tenant, digest = args[1], args[2]
  local known = redis.call('HGET', header, 'tenant')
  if known then
    if known ~= tenant then return { 'NORUN' } end
    return { same(digest, (recall(header, 0))) and 'DUP' or 'MISMATCH' }
  end
  for name, value in pairs(cjson.decode(args[3])) do
    redis.call('HSET', header, name, value)
  end
  redis.call('HSET', header, 'tenant', tenant, 'status', 'failed', 'epoch', 0, 'owner', '',
    'admitted', 0, 'committed', 0, 'bytes', 0, 'parked_bytes', 0, 'told', -1, 'x:0', 1)
  remember(header, 0, digest, 0, 0)
  redis.call('HSET', outcome, unpack(rest(args, 5)))
  redis.call('PEXPIRE', outcome, args[4])
  redis.call('PEXPIRE', header, args[4])
  return { 'OK' }
end

-- acquire(header; epoch, server, owner) -> {OK, admitted, committed} | {STALE, epoch} | {NORUN}
local function acquire(keys, args)
  check_server(args[2])
  local h = redis.call('HMGET', keys[1], 'epoch', 'owner', 'admitted', 'committed')
  if not h[1] then return { 'NORUN' } end
  local epoch = tonumber(args[1])
  if epoch > num(h[1]) then
    redis.call('HSET', keys[1], 'epoch', epoch, 'owner', args[3])
  elseif not (epoch == num(h[1]) and h[2] == args[3]) then -- equal: my own first try, its reply lost
    return { 'STALE', num(h[1]) }
  end
  return { 'OK', num(h[3]), num(h[4]) }
end

-- release(header; epoch, server) -> OK | FENCED | BUSY. An idle run gets back to having no owner.
local function release(keys, args)
  check_server(args[2])
  local h = redis.call('HMGET', keys[1], 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= tonumber(args[1]) then return 'FENCED' end
  if num(h[2]) > num(h[3]) then return 'BUSY' end
  redis.call('HSET', keys[1], 'owner', '')
  return 'OK'
end

-- What `begin` notes about an attempt: one per epoch, because a call repeated after a lost reply is
-- no second attempt, and an owner that tries again has taken the run over anew.
-- -> attempts so far, deaths so far
local function note_attempt(header, seq, epoch)
  local known = redis.call('HMGET', header, 'n:' .. seq, 'b:' .. seq)
  local attempts, last = string.match(known[1] or '0 none', '(%d+) (%S+)')
  attempts = tonumber(attempts)
  if tonumber(last) ~= epoch then
    attempts = attempts + 1
    redis.call('HSET', header, 'n:' .. seq, attempts .. ' ' .. epoch)
  end
  return attempts, num(known[2], 0)
end

-- begin(header; epoch, server, seq) -> {OK, attempts, deaths} | {FENCED} | {ALREADY} | {ORDER}
-- The owner is about to execute this op: what it does outside of Redis is its own from here on.
local function begin(keys, args)
  check_server(args[2])
  local header, epoch, seq = keys[1], tonumber(args[1]), tonumber(args[3])
  local h = redis.call('HMGET', header, 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= epoch then return { 'FENCED' } end
  if seq <= num(h[3]) then return { 'ALREADY' } end
  if seq ~= num(h[3]) + 1 or seq > num(h[2]) then return { 'ORDER' } end
  return { 'OK', note_attempt(header, seq, epoch) }
end

-- One outcome, written once: shared by commit and fail_range.
local function store_outcome(header, outcome, channel, seq, ttl, fields)
  redis.call('HSET', outcome, unpack(fields))
  redis.call('PEXPIRE', outcome, ttl)
  redis.call('HSET', header, 'committed', seq)
  forget_pending(header, seq)
  -- Replay follows the recorded outcome, which outlives the outcome's own record.
  if field_of(fields, 'state') == 'failed' then redis.call('HSET', header, 'x:' .. seq, 1) end
  redis.call('SPUBLISH', channel, seq)
end

-- untold: seqs whose gradient is missing, and the client has not been told. Trim forgets outcomes,
-- never this; an op that clears the gradient does, because nothing can miss them any more.
local function note_untold(header, seq, gradient)
  if gradient == 'cleared' then
    redis.call('HDEL', header, 'untold')
  elseif gradient == 'lost' then
    local untold = redis.call('HGET', header, 'untold')
    redis.call('HSET', header, 'untold', untold and untold .. ' ' .. seq or seq)
  end
end

-- commit(header, outcome, channel; epoch, server, seq, ttl ms, next seq to begin or -1,
--        what became of the gradient: lost | cleared | kept, digest of the state, outcome fields ...)
-- -> {OK, attempts, deaths of the next} | {ALREADY} | {FENCED} | {ORDER}
-- The only writer of an outcome, and it writes once.
local function commit(keys, args)
  check_server(args[2])
  local header = keys[1]
  local epoch, seq, next_seq = tonumber(args[1]), tonumber(args[3]), tonumber(args[5])
  local h = redis.call('HMGET', header, 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= epoch then return { 'FENCED' } end
  if seq <= num(h[3]) then return { 'ALREADY' } end
  if seq ~= num(h[3]) + 1 or seq > num(h[2]) then return { 'ORDER' } end
  store_outcome(header, keys[2], keys[3], seq, args[4], rest(args, 8))
  if args[7] ~= '' then redis.call('HSET', header, 's:' .. seq, args[7]) end
  note_untold(header, seq, args[6])
  if next_seq == seq + 1 and next_seq <= num(h[2]) then
    return { 'OK', note_attempt(header, next_seq, epoch) }
  end
  return { 'OK', 0, 0 }
end

-- blame(header; epoch, server, seq) -> deaths so far | -1 if fenced | -2 if this op is not under way
-- The engine died while it executed this op. One attempt has one death, however often it is told: a
-- call repeated after a lost reply must not bring the op nearer to quarantine.
local function blame(keys, args)
  check_server(args[2])
  local header, epoch, seq = keys[1], tonumber(args[1]), tonumber(args[3])
  local h = redis.call('HMGET', header, 'epoch', 'committed')
  if not h[1] or num(h[1]) ~= epoch then return -1 end
  if seq ~= num(h[2]) + 1 then return -2 end
  local a = redis.call('HMGET', header, 'n:' .. seq, 'a:' .. seq, 'b:' .. seq)
  if not a[1] then return -2 end
  if a[1] == a[2] then return num(a[3]) end
  redis.call('HSET', header, 'a:' .. seq, a[1])
  return redis.call('HINCRBY', header, 'b:' .. seq, 1)
end

-- halve(header; epoch, server, seq, halvings) -> OK | FENCED | ORDER
-- Before an op is executed otherwise than as usual: whoever replays it must do the same.
local function halve(keys, args)
  check_server(args[2])
  local header, seq = keys[1], tonumber(args[3])
  local h = redis.call('HMGET', header, 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= tonumber(args[1]) then return 'FENCED' end
  if seq <= num(h[3]) or seq > num(h[2]) then return 'ORDER' end
  redis.call('HSET', header, 'm:' .. seq, args[4])
  return 'OK'
end

-- trim(header, log; epoch, server, seq) -> OK | FENCED | ORDER
-- A snapshot at or after seq is confirmed: the log and the per-seq fields up to it are not needed.
local function trim(keys, args)
  check_server(args[2])
  local header, log, epoch, seq = keys[1], keys[2], tonumber(args[1]), tonumber(args[3])
  local h = redis.call('HMGET', header, 'epoch', 'committed', 'trimmed')
  if not h[1] or num(h[1]) ~= epoch then return 'FENCED' end
  if seq > num(h[2]) then return 'ORDER' end
  for s = num(h[3], -1) + 1, seq do
    redis.call('HDEL', header, 'd:' .. s, 'x:' .. s, 's:' .. s, 'm:' .. s)
  end
  if seq > num(h[3], -1) then redis.call('HSET', header, 'trimmed', seq) end
  redis.call('XTRIM', log, 'MINID', entry_id(seq + 1))
  return 'OK'
end

-- ffwd(header, log, parked, news channel; epoch, server, seq) -> OK | FENCED | ALREADY
-- Redis was rolled back behind a snapshot: the effects up to seq are in it, the ids are used up.
local function ffwd(keys, args)
  check_server(args[2])
  local header, parked, epoch, seq = keys[1], keys[3], tonumber(args[1]), tonumber(args[3])
  local h = redis.call('HMGET', header, 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= epoch then return 'FENCED' end
  local admitted, committed = num(h[2]), num(h[3])
  if seq <= committed then return 'ALREADY' end
  for _, s in ipairs(redis.call('HKEYS', parked)) do
    if tonumber(s) <= seq then unpark(header, parked, tonumber(s)) end
  end
  for s = committed + 1, seq do forget_pending(header, s) end
  redis.call('HSET', header, 'committed', seq)
  if seq > admitted then advance(header, keys[2], parked, keys[4], seq) end
  return 'OK'
end

-- publish(header; epoch, server, seq, key) -> OK | FENCED | STALE
-- The in-flight sampler weights of a run move forward, never back.
local function publish(keys, args)
  check_server(args[2])
  local h = redis.call('HMGET', keys[1], 'epoch', 'published_epoch', 'published_seq')
  local epoch, seq = tonumber(args[1]), tonumber(args[3])
  if not h[1] or num(h[1]) ~= epoch then return 'FENCED' end
  local e, s = num(h[2], -1), num(h[3], -1)
  if epoch < e or (epoch == e and seq <= s) then return 'STALE' end
  redis.call('HSET', keys[1], 'published_epoch', epoch, 'published_seq', seq, 'published', args[4])
  return 'OK'
end

-- fail_range(header, parked, channel, outcome ...; epoch, server, first seq, ttl ms, fields ...)
-- -> OK | ALREADY | FENCED | ORDER. The gap at `first` is given up: fail the seqs from it on, one per
-- outcome key, whether they are parked or never arrived; the run has failed and takes no more.
-- ORDER also if what is missing has arrived meanwhile, or if an op is parked above the range: it
-- would be accepted and never end.
local function fail_range(keys, args)
  check_server(args[2])
  local header, parked, channel = keys[1], keys[2], keys[3]
  local epoch, first, last = tonumber(args[1]), tonumber(args[3]), tonumber(args[3]) + #keys - 4
  local h = redis.call('HMGET', header, 'epoch', 'admitted', 'committed')
  if not h[1] or num(h[1]) ~= epoch then return 'FENCED' end
  if last <= num(h[3]) then return 'ALREADY' end
  if first ~= num(h[3]) + 1 or num(h[2]) > num(h[3]) then return 'ORDER' end
  for _, s in ipairs(redis.call('HKEYS', parked)) do
    if tonumber(s) > last then return 'ORDER' end
  end
  local fields = rest(args, 5)
  for seq = first, last do
    if redis.call('HEXISTS', parked, seq) == 1 then unpark(header, parked, seq) end
    store_outcome(header, keys[4 + seq - first], channel, seq, args[4], fields)
  end
  redis.call('HSET', header, 'admitted', last, 'status', 'failed')
  forget_gap(header, parked)
  return 'OK'
end

-- lost(header, parked; seq) -> OK. A client asks for the result of a seq that is not here: its
-- admission is lost with a rollback of Redis, so a gap below what waits need not be waited for.
local function lost(keys, args)
  local admitted = redis.call('HGET', keys[1], 'admitted')
  if not admitted or tonumber(args[1]) <= num(admitted) then return 'OK' end
  if redis.call('HEXISTS', keys[2], args[1]) == 0 then redis.call('HSET', keys[1], 'lost', args[1]) end
  return 'OK'
end

-- told(header; seq): the error of this seq has been delivered to the client. `told` moves only as far
-- as every lost gradient up to it has been: errors of concurrent polls arrive in any order, and an
-- optimizer step must not be obeyed because a later failure than its gradient's was known
-- (reliability 1.6).
local function told(keys, args)
  local header, seq = keys[1], args[1]
  local h = redis.call('HMGET', header, 'told', 'untold', 'committed')
  if not h[2] then return 'OK' end
  local untold, is_untold = {}, false
  for s in string.gmatch(h[2], '%d+') do
    if s == seq then is_untold = true else untold[#untold + 1] = s end
  end
  if not is_untold then return 'OK' end
  local known = untold[1] and tonumber(untold[1]) - 1 or num(h[3])
  if untold[1] then
    redis.call('HSET', header, 'untold', table.concat(untold, ' '))
  else
    redis.call('HDEL', header, 'untold')
  end
  if known > num(h[1]) then redis.call('HSET', header, 'told', known) end
  return 'OK'
end

-- Append to the completions of one clone of a sampling session. Positions are milliseconds since the
-- epoch, or the next number: counted from what Redis knows they would be used again after a rollback,
-- and a client that has read so far would never be told of what ended next.
local function complete(header, completions, clone, seq, state, size, ttl)
  local last, now = 'completed:' .. clone, redis.call('TIME')
  local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
  local position = math.max(num(redis.call('HGET', header, last), 0) + 1, now_ms)
  redis.call('HSET', header, last, position)
  redis.call('XADD', completions, position .. '-0', 'seq', seq, 'state', state, 'size', size)
  redis.call('PEXPIRE', completions, ttl)
end

-- enqueue(header, outcome, jobs, completions; tenant, seq, digest, clone, max jobs, ttl ms, now ms,
--         header fields as JSON or '', job fields ...) -> OK | DUP | MISMATCH | NOSESSION | BUSY
-- With job fields that begin with `state`, they are an outcome: the request was refused.
local function enqueue(keys, args)
  local header, outcome, jobs = keys[1], keys[2], keys[3]
  local tenant, seq, digest = args[1], args[2], string.sub(args[3], 1, DIGEST_CHARS)
  local fields = rest(args, 9)
  local known = redis.call('HGET', header, 'tenant')
  if not known then
    if args[8] == '' then return 'NOSESSION' end
    for name, value in pairs(cjson.decode(args[8])) do
      redis.call('HSET', header, name, value)
    end
    redis.call('HSET', header, 'tenant', tenant)
    known = tenant
  end
  if known ~= tenant then return 'NOSESSION' end
  local first = redis.call('HGET', outcome, 'request')
  if first then return first == digest and 'DUP' or 'MISMATCH' end
  if fields[1] == 'state' then
    redis.call('HSET', outcome, 'request', digest, unpack(fields))
    redis.call('PEXPIRE', outcome, args[6])
    complete(header, keys[4], args[4], seq, 'failed', field_of(fields, 'size'), args[6])
    return 'OK'
  end
  if redis.call('XLEN', jobs) >= tonumber(args[5]) then return 'BUSY' end
  local entry = redis.call('XADD', jobs, '*', 'seq', seq, 'clone', args[4], unpack(fields))
  redis.call('HSET', outcome, 'request', digest, 'state', 'queued', 'entry', entry, 'at', args[7])
  redis.call('PEXPIRE', outcome, args[6])
  return 'OK'
end

-- One outcome of a sampling job, unless it has one. -> whether this is it
-- A job whose record has expired has no reader left: an outcome for it could be overwritten by a
-- late POST.
local function store_sample(keys, seq, clone, ttl, fields)
  local header, outcome, completions, channel = keys[1], keys[2], keys[4], keys[5]
  local state = redis.call('HGET', outcome, 'state')
  if state ~= 'queued' then return false end
  redis.call('HSET', outcome, unpack(fields))
  redis.call('PEXPIRE', outcome, ttl)
  local done = field_of(fields, 'state') == 'completed' and 'finished' or 'failed'
  complete(header, completions, clone, seq, done, field_of(fields, 'size'), ttl)
  redis.call('SPUBLISH', channel, seq)
  return true
end

-- settle(header, outcome, jobs, completions, channel, usage; seq, clone, group, entry id, ttl ms,
--        outcome fields ...) -> OK | ALREADY
-- The first outcome of a sampling job wins; the job leaves the stream in the same step, and what it
-- used is counted once. Nobody who counts is awaited: the oldest entries go when there are too many.
local function settle(keys, args)
  local fields = rest(args, 6)
  local stored = store_sample(keys, args[1], args[2], args[5], fields)
  local usage = field_of(fields, 'usage')
  if stored and usage then
    local h = redis.call('HMGET', keys[1], 'tenant', 'base_model')
    redis.call('XADD', keys[6], 'MAXLEN', '~', MAX_USAGE_ENTRIES, '*', 'tenant', h[1],
      'model', h[2], 'usage', usage)
  end
  redis.call('XACK', keys[3], args[3], args[4])
  redis.call('XDEL', keys[3], args[4])
  return stored and 'OK' or 'ALREADY'
end

-- cancel(header, outcome, jobs, completions, channel, cancel channel; seq, clone, group, ttl ms,
--        request id, outcome fields ...) -> OK | ALREADY
-- An unknown or finished sample stays as it is. A queued one is taken off the stream; whichever
-- sampler may be at work on it is hinted, and what it settles later changes nothing.
local function cancel(keys, args)
  local entry = redis.call('HGET', keys[2], 'entry')
  if not entry then return 'ALREADY' end
  if not store_sample(keys, args[1], args[2], args[4], rest(args, 6)) then return 'ALREADY' end
  redis.call('XACK', keys[3], args[3], entry)
  redis.call('XDEL', keys[3], entry)
  redis.call('SPUBLISH', keys[6], args[5])
  return 'OK'
end

-- hold_lease(key; incarnation, value, ttl ms) -> 1 if the name is ours (now), else 0
local function hold_lease(keys, args)
  local held = redis.call('GET', keys[1])
  if held and cjson.decode(held).incarnation ~= args[1] then return 0 end
  redis.call('SET', keys[1], args[2], 'PX', args[3])
  return 1
end

-- release_lease(key; incarnation) -> 1 if it was ours
local function release_lease(keys, args)
  local held = redis.call('GET', keys[1])
  if not held or cjson.decode(held).incarnation ~= args[1] then return 0 end
  return redis.call('DEL', keys[1])
end

redis.register_function('lu1_admit', admit)
redis.register_function('lu1_reject_run', reject_run)
redis.register_function { function_name = 'lu1_server', callback = server, flags = { 'no-writes' } }
redis.register_function('lu1_acquire', acquire)
redis.register_function { function_name = 'lu1_release', callback = release, flags = { 'allow-oom' } }
-- Results can be committed and memory freed when Redis is full.
redis.register_function { function_name = 'lu1_begin', callback = begin, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_commit', callback = commit, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_blame', callback = blame, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_halve', callback = halve, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_trim', callback = trim, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_ffwd', callback = ffwd, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_publish', callback = publish, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_fail_range', callback = fail_range, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_lost', callback = lost, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_told', callback = told, flags = { 'allow-oom' } }
redis.register_function('lu1_enqueue', enqueue)
redis.register_function { function_name = 'lu1_settle', callback = settle, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_cancel', callback = cancel, flags = { 'allow-oom' } }
redis.register_function { function_name = 'lu1_hold_lease', callback = hold_lease, flags = { 'allow-oom' } }
redis.register_function('lu1_release_lease', release_lease)
