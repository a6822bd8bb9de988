{{/*
Who makes the certificates: chart, certManager or existing. `auto` stays with the chart's once there are some: another authority
would shut out the job's processes.
*/}}
{{- define "arc-topk.certs.provider" -}}
{{- $provider := .Values.certificates.provider }}
{{- if eq $provider "auto" }}
{{- $made := lookup "v1" "Secret" .Release.Namespace (include "arc-topk.certs.authoritySecret" .) }}
{{- $there := .Capabilities.APIVersions.Has "cert-manager.io/v1" }}
{{- $provider = and $there (not $made) | ternary "certManager" "chart" }}
{{- end }}
{{- if and (not .Values.shards.enabled) (ne $provider "existing") }}
{{- fail "shards.enabled is false, so the workers' certificates must come from the release with the shards: set certificates.provider to existing, and certificates.existing.workerSecret" }}
{{- end }}
{{- $provider }}
{{- end }}

{{- define "arc-topk.certs.authoritySecret" -}}
{{ include "arc-topk.fullname" . }}-authority
{{- end }}

{{/* Name and keys of a role's secret: (dict "root" $ "role" "shard"). YAML. */}}
{{- define "arc-topk.certs.secret" -}}
{{- $provider := include "arc-topk.certs.provider" .root }}
{{- $full := include "arc-topk.fullname" .root }}
{{- if eq $provider "existing" }}
{{- with .root.Values.certificates.existing }}
name: {{ required (printf "certificates.existing.%sSecret is empty" $.role) (index . (printf "%sSecret" $.role)) }}
ca: {{ .keys.ca }}
cert: {{ .keys.cert }}
key: {{ .keys.key }}
{{- end }}
{{- else }}
name: {{ $full }}-{{ .role }}-{{ eq $provider "chart" | ternary "certs" "tls" }}
ca: ca.crt
cert: tls.crt
key: tls.key
{{- end }}
{{- end }}

{{/* Names and addresses of the shards, as JSON: {"dns": […], "ips": […]}. Workers check the host that they dial. */}}
{{- define "arc-topk.certs.hosts" -}}
{{- $service := printf "%s.%s.svc" (include "arc-topk.shardService" .) .Release.Namespace }}
{{- $dns := list "localhost" (printf "*.%s" $service) }}
{{- $ips := list "127.0.0.1" "::1" }}
{{- range concat .Values.shards.external.hosts .Values.certificates.extraHosts }}
{{- if or (regexMatch "^[0-9.]+$" .) (contains ":" .) }}
{{- $ips = append $ips . }}
{{- else }}
{{- $dns = append $dns . }}
{{- end }}
{{- end }}
{{- dict "dns" (uniq $dns) "ips" (uniq $ips) | toJson }}
{{- end }}
