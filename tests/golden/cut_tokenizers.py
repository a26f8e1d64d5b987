"""Cut the full reference tokenizers down to what the reference rows need: single bytes or characters, and the merges that their texts use.

    python tests/golden/cut_tokenizers.py FOLDER     FOLDER holds the full *.tokenizer.json.xz and labels.jsonl.xz

BPE applies the pair of lowest rank first, so with every merge that it ever applied to a text still there, the text gives the same ids.
"""
import json,lzma,re,sys
from pathlib import Path
from tokenizers import Tokenizer
G, OUT = Path(sys.argv[1]), Path(__file__).resolve().parent
rows=[json.loads(l) for l in lzma.open(G/'labels.jsonl.xz','rt')]
for name in ("sentencepiece_like","llama3_bos","chatml_no_bos"):
    raw=lzma.decompress((G/f'{name}.tokenizer.json.xz').read_bytes()).decode(); d=json.loads(raw); tok=Tokenizer.from_str(raw)
    texts=sorted({c for r in rows if r['tokenizer']==name for c in [r['prompt'],*r['prompt'].split('<image>'),*[t['value'] for t in r['conversations']]]})
    texts+= ["Hi there","USER: ","Name three"," ASSISTANT:","What is it?"]
    model=d['model']; merges=[tuple(m) if isinstance(m,list) else tuple(m.split(' ')) for m in model['merges']]
    rank={m:i for i,m in enumerate(merges)}
    ids={i for t in texts for i in tok.encode(t).ids}
    used=set()
    # every merge that BPE applies on these texts: replay it on each pre-token
    def replay(sym):
        while len(sym)>1:
            best=min(((rank[p],k) for k,p in enumerate(zip(sym,sym[1:])) if p in rank),default=None)
            if best is None: return
            r,k=best; used.add(r); sym=sym[:k]+[sym[k]+sym[k+1]]+sym[k+2:]
    words=set()
    specials=sorted((t['content'] for t in d['added_tokens']),key=len,reverse=True); pat=re.compile('|'.join(map(re.escape,specials)))
    for t in texts:
        for seg in pat.split(t):
            if not seg: continue
            n=tok.normalizer.normalize_str(seg) if tok.normalizer else seg
            if tok.pre_tokenizer: words|={w for w,_ in tok.pre_tokenizer.pre_tokenize_str(n)}
            else: words.add(n)
    vocab=model['vocab']
    for w in words:
        if model.get('byte_fallback'): sym=[x for c in w for x in ([c] if c in vocab else [f'<0x{b:02X}>' for b in c.encode()])]
        else: sym=list(w)
        if model.get('ignore_merges') and w in vocab: ids.add(vocab[w])
        replay(sym)
    keep_m=[merges[i] for i in sorted(used)]
    need={x for m in keep_m for x in (*m,''.join(m))}
    inv={i:t for t,i in vocab.items()}
    need|={inv[i] for i in ids if i in inv}
    need|={t for t in vocab if len(t)==1 and (not model.get('byte_fallback') or ord(t)<0x250 or t=='▁')}|{t for t in vocab if re.fullmatch('<0x[0-9A-F]{2}>',t)}
    need|={t['content'] for t in d['added_tokens'] if t['content'] in vocab}
    model['vocab']={t:i for t,i in vocab.items() if t in need}; model['merges']=[list(m) for m in keep_m]
    d['added_tokens']=[t for t in d['added_tokens'] if not re.search(r'reserved_special_token_([1-9]\d*)',t['content'])]
    model['vocab'].update({t['content']:t['id'] for t in d['added_tokens']})  # else they are numbered anew behind a smaller vocabulary
    new=json.dumps(d,ensure_ascii=False); small=Tokenizer.from_str(new)
    bad=[t for t in texts if small.encode(t).ids!=tok.encode(t).ids]
    data=lzma.compress(new.encode(),preset=9); (OUT/f'{name}.tokenizer.json.xz').write_bytes(data)
    print(name,len(texts),'differ',len(bad),bad[:2],len(model['vocab']),len(keep_m),len(data))
