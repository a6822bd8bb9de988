{{/* Name of the program, for labels. */}}
{{- define "arc-topk.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/*
Start of all names, at most 32 characters: pool, hash and index must find room behind it in a host name of 63. A longer one is
shortened to something that no other release has.
*/}}
{{- define "arc-topk.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $chart := default .Chart.Name .Values.nameOverride }}
{{- $name = contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) }}
{{- /* A release may be called 1.x, a service may not. */}}
{{- $name = regexReplaceAll "^([^a-z])" (replace "." "-" $name) "arc-${1}" }}
{{- end }}
{{- if gt (len $name) 32 }}
{{- $name = printf "%s-%s" (trunc 23 $name | trimSuffix "-") (sha256sum $name | trunc 8) }}
{{- end }}
{{- $name }}
{{- end }}

{{- define "arc-topk.shardName" -}}
{{ include "arc-topk.fullname" . }}-shard
{{- end }}

{{/* The headless service that gives shards their names. */}}
{{- define "arc-topk.shardService" -}}
{{ include "arc-topk.fullname" . }}-shards
{{- end }}

{{- define "arc-topk.serviceAccountName" -}}
{{- $fallback := .Values.serviceAccount.create | ternary (include "arc-topk.fullname" .) "default" }}
{{- default $fallback .Values.serviceAccount.name }}
{{- end }}

{{/* Labels by which objects find pods: (dict "root" $ "component" "shard"), and "pool" for that of one pool. */}}
{{- define "arc-topk.selector" -}}
app.kubernetes.io/name: {{ include "arc-topk.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
arc-topk/pool: {{ . }}
{{- end }}
{{- end }}

{{/* Monitoring takes it for `job`: shards and workers of one training job share it, also across releases. */}}
{{- define "arc-topk.jobLabel" -}}
arc-topk/job: {{ include "arc-topk.jobName" . }}
{{- end }}

{{/*
Labels of an object, arguments as above. Pods get "arc-topk.podLabels" instead: versions in them would replace a Job, and
restart every pod, at each upgrade of the chart.
*/}}
{{- define "arc-topk.labels" -}}
{{ include "arc-topk.selector" . }}
app.kubernetes.io/part-of: arc-topk
{{ include "arc-topk.jobLabel" .root }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "arc-topk.podLabels" -}}
{{ include "arc-topk.selector" . }}
app.kubernetes.io/part-of: arc-topk
{{ include "arc-topk.jobLabel" .root }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* An `annotations` block if there are any, on lines of its own: (dict "root" $ "own" (list map …) "indent" 2). */}}
{{- define "arc-topk.annotations" -}}
{{- $all := deepCopy .root.Values.commonAnnotations }}
{{- range .own }}
{{- range $key, $value := . }}
{{- $_ := set $all $key $value }}
{{- end }}
{{- end }}
{{- with $all }}
{{- dict "annotations" . | toYaml | nindent $.indent }}
{{- end }}
{{- end }}

{{/* Image reference: (dict "root" $ "image" map). */}}
{{- define "arc-topk.image" -}}
{{- $name := .image.repository }}
{{- with .image.registry }}
{{- $name = printf "%s/%s" . $name }}
{{- end }}
{{- if .image.digest }}
{{- printf "%s@%s" $name .image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) }}
{{- end }}
{{- end }}

{{/* A value as the text of an environment variable. Numbers of a values file are floats, and a million must not become 1e+06. */}}
{{- define "arc-topk.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) (lt . 9e15) (gt . -9e15) }}
{{- int64 . }}
{{- else }}
{{- . }}
{{- end }}
{{- end }}
