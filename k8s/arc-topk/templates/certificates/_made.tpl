{{/*
The authority as it was or as it is to be. YAML: `data` of its secret, `stage` of its replacement, and `signer` with `cert` and
`key`, `trusted` (certificates), all in base 64.

While it is replaced there is a `next` one beside it: prepare (both are trusted), switch (the next one signs), finish (it takes
the other's place). Without a stage in the values the one that was reached stays.
*/}}
{{- define "arc-topk.made.authority" -}}
{{- $old := lookup "v1" "Secret" .Release.Namespace (include "arc-topk.certs.authoritySecret" .) }}
{{- $data := deepCopy (default dict $old.data) }}
{{- $asked := .Values.certificates.chart.authorityRotation }}
{{- $stage := default (dig "metadata" "annotations" "arc-topk/stage" "" $old) $asked }}
{{- if not (index $data "ca.crt") }}
{{- $data = include "arc-topk.made.newAuthority" (dict "root" . "prefix" "ca") | fromYaml }}
{{- $stage = "" }}
{{- end }}
{{- $next := index $data "next.crt" }}
{{- if and (eq $stage "prepare") (not $next) }}
{{- $data = merge (include "arc-topk.made.newAuthority" (dict "root" . "prefix" "next") | fromYaml) $data }}
{{- else if and (eq $stage "switch") (not $next) }}
{{- fail "certificates.chart.authorityRotation=switch: there is no next authority yet, upgrade with prepare first" }}
{{- else if and (eq $stage "finish") $next }}
{{- if eq (dig "metadata" "annotations" "arc-topk/stage" "" $old) "prepare" }}
{{- fail "certificates.chart.authorityRotation=finish: the certificates are still of the old authority, upgrade with switch first" }}
{{- end }}
{{- $data = dict "ca.crt" $next "ca.key" (index $data "next.key") }}
{{- end }}
{{- if eq $stage "finish" }}
{{- $stage = "" }}
{{- end }}
{{- $trusted := index $data "ca.crt" | b64dec | trimSuffix "\n" }}
{{- with index $data "next.crt" }}
{{- $trusted = printf "%s\n%s" $trusted (b64dec . | trimSuffix "\n") }}
{{- end }}
{{- $signs := eq $stage "switch" | ternary "next" "ca" }}
{{- $signer := dict "cert" (index $data (printf "%s.crt" $signs)) "key" (index $data (printf "%s.key" $signs)) }}
{{- dict "data" $data "stage" $stage "signer" $signer "trusted" (printf "%s\n" $trusted | b64enc) | toYaml }}
{{- end }}

{{/* Data of a fresh authority. The digest in its name tells it from others of the job, so that TLS names an unknown issuer. */}}
{{- define "arc-topk.made.newAuthority" -}}
{{- $key := genPrivateKey "ecdsa" }}
{{- $name := printf "arc-topk CA %s %s" (include "arc-topk.fullname" .root) (sha256sum $key | trunc 8) }}
{{- $made := genCAWithKey $name (int .root.Values.certificates.chart.authorityDays) $key }}
{{- dict (printf "%s.crt" .prefix) (b64enc $made.Cert) (printf "%s.key" .prefix) (b64enc $made.Key) | toYaml }}
{{- end }}

{{/*
A role's certificate: the one that is there while it fits, else another. YAML: `data` and `annotations`. A worker's has no
names: what sprig makes may serve as well as join, but nobody believes a server without the name that was dialled.
*/}}
{{- define "arc-topk.made.identity" -}}
{{- $settings := .root.Values.certificates.chart }}
{{- $secret := include "arc-topk.certs.secret" . | fromYaml }}
{{- $old := lookup "v1" "Secret" .root.Release.Namespace $secret.name }}
{{- $notes := dig "metadata" "annotations" dict $old }}
{{- $hosts := dict "dns" list "ips" list }}
{{- if eq .role "shard" }}
{{- $hosts = include "arc-topk.certs.hosts" .root | fromJson }}
{{- end }}
{{- $annotations := dict
  "arc-topk/hosts" (toJson $hosts | sha256sum)
  "arc-topk/signer" (sha256sum .authority.signer.cert)
  "arc-topk/generation" ($settings.generation | toString) }}
{{- $fits := not (empty (dig "data" "tls.crt" "" $old)) }}
{{- range $note, $value := $annotations }}
{{- if ne $value (get $notes $note) }}
{{- $fits = false }}
{{- end }}
{{- end }}
{{- $left := sub (get $notes "arc-topk/not-after" | int64) (now | unixEpoch | int64) }}
{{- if lt $left (mul 86400 (int $settings.renewBeforeDays)) }}
{{- $fits = false }}
{{- end }}
{{- if $fits }}
{{- $data := dict "ca.crt" .authority.trusted "tls.crt" (index $old.data "tls.crt") "tls.key" (index $old.data "tls.key") }}
{{- $_ := set $annotations "arc-topk/not-after" (get $notes "arc-topk/not-after") }}
{{- dict "data" $data "annotations" $annotations | toYaml }}
{{- else }}
{{- $days := int $settings.validityDays }}
{{- $authority := buildCustomCert .authority.signer.cert .authority.signer.key }}
{{- $name := printf "arc-topk %s" .role }}
{{- $made := genSignedCertWithKey $name $hosts.ips $hosts.dns $days $authority (genPrivateKey "ecdsa") }}
{{- $_ := set $annotations "arc-topk/not-after" (add (now | unixEpoch | int64) (mul 86400 $days) | toString) }}
{{- dict "data" (dict "ca.crt" .authority.trusted "tls.crt" (b64enc $made.Cert) "tls.key" (b64enc $made.Key)) "annotations" $annotations | toYaml }}
{{- end }}
{{- end }}
